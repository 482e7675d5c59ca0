"""Ways to open a looped model: by name, from memory, or by looping an ordinary one."""
