"""What takes too long for a page: measured once, kept in `bench/results`, read by chapters."""
