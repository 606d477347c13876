"""What decoded features are worth on public benchmarks: DA-2K, COCO mIoU, FID (table 8 of arXiv 2412.09585)."""
