"""Command-line tools for developers: benchmark, numerical precision, FLOP counts, planning."""
