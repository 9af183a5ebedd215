"""`harness leaderboard`: tables, statistics and web pages of finished runs."""

from harness.cli.leaderboard.verbs import add_parser as add_parser
