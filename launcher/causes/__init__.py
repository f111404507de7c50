"""What may be the matter with a run: what is known of it, and the rules that judge it. ``launcher.why`` asks them."""
