"""The page of the Serve application, tried in a real browser (`make browser`)."""
