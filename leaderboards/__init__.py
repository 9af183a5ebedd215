"""Run records -> tables, statistics. Reads what runs wrote; knows no torch and no engine."""
