"""What leaves for the Hub: pushes, cards, and errors in the user's words."""
