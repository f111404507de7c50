"""What a model is made of and what training it will hold in memory, before anything is loaded."""
