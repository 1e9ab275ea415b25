"""What every room uses: errors, the console, output folders, keys of recipes, and what must not leave the machine."""
