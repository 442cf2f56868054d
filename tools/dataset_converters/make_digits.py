"""Make the data set of digits."""

from man_mm.datasets.make_digits import main

if __name__ == '__main__':
    main()
