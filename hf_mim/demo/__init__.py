"""A checkpoint seen in a browser: an app by Gradio, a Space of the Hub, and a page that needs no server."""
