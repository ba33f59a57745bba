"""What a run tells monitoring systems: Prometheus, Ray's metrics, TensorBoard and trackers. By the controller only."""
