"""Plain HTTP before a Triton server: texts and images in, JSON out, and a page. Needs the extra ``http``; no torch."""
