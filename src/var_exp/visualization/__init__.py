"""Pictures and plots, and how metrics are named in them."""
