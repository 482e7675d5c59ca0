"""The dynamics of any looped model on any prompts."""
