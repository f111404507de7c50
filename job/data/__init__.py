"""From files to token ids: reading, rendering, masking, and the report of what became of every row."""
