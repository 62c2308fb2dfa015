"""What is made of result files: a page for a browser, a summary in Markdown, a comparison of two."""
