"""`hf-mim new`: a part of one's own, with its test and a recipe that run as they are written."""
