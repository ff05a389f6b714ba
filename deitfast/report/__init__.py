"""`deitfast report`: what runs have learned, as one HTML page and a Markdown table.

read (run folders -> plain data) -> compare -> figures, samples -> page, markdown; write puts them together.
"""
