"""Train configs with several seeds and compare them."""

from man_mm.benchmark.comparison import main

if __name__ == '__main__':
    main()
