"""What a run will need: memory, programs and seconds, on devices that may be absent."""
