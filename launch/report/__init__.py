"""Report of a run or a sweep: facts from its folder, as one HTML page, Markdown or JSON."""
