"""What `luve bench` measures: a subject a module, whose `measure` takes a device, repeats and options of its own."""
