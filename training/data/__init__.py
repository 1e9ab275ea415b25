"""From a path, a URL or an id on the Hub to batches of images."""
