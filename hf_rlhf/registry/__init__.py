"""Find plugins without importing them; API version, settings schema, hook specifications."""
