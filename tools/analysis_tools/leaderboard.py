"""Add to the leaderboard, check it, and write its tables and pages."""

from man_mm.leaderboard.board import main

if __name__ == '__main__':
    main()
