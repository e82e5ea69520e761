"""What tests share: cases, models, servers that are not there, what the interpreter lacks."""
