"""Speed and memory against textbook code and installable peers: ``python -m benchmarks.<name> [--json PATH]`` prints one JSON object."""
