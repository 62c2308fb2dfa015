"""Results of rekd-bench as one page for a browser and a summary in Markdown."""
