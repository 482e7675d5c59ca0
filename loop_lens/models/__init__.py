"""What loops: the native model, published families, HRM-Text, windows of ordinary decoders."""
