"""Files and weights: read, recognise, fill a model, choose EMA weights, export."""
