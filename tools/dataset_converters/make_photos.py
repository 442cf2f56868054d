"""Make the data set of photos."""

from man_mm.datasets.make_photos import main

if __name__ == '__main__':
    main()
