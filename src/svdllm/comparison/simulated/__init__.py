"""Systems in few bits that are only simulated for tables: weights are stored dequantised, bytes counted by formula."""
