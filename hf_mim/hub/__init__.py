"""What leaves for the Hub. Import from the file: `push.push`, `push.write_card`, `card.make_card`, `errors.explain`."""
