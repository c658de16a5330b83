"""From a checkpoint and texts to the similarities of every layer. Nothing here knows Ray."""
