"""State of a run as a checkpoint holds it: model, optimizer, plug-ins, attributes."""
