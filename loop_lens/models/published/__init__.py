"""Published families as mappings onto the native model."""
