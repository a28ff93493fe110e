"""What the user typed: commands, options, and Lightning's command line."""
