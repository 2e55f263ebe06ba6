"""Statistics for weights that training never normalized with: averaged, or on other images."""
