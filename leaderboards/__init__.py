"""Tables and statistics from the records of runs. This package reads files of runs, and imports neither torch nor the engine."""
