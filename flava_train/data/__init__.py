"""What a run learns from: samples read, ordered and drawn, the same for any ranks and workers."""
