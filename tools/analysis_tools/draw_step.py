"""Draw the memory of one training step over time."""

from man_mm.benchmark.step_picture import main

if __name__ == '__main__':
    main()
