"""Bad inputs, damaged files, crashes: each fault has an id, and each id a case here or one that is named."""
