"""The leaderboard: entries, their checks, tables in documents, and the site."""
