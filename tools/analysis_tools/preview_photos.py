"""Draw what super-resolution models return."""

from man_mm.benchmark.restored_photos import main

if __name__ == '__main__':
    main()
