"""The few ways in which methods reach into a backbone, each written once."""
