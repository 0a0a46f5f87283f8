"""What a run will cost, before it runs: bytes (exact), seconds, node-hours and memory."""
