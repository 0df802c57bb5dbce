"""The matcher node: the only part of the package that needs rclpy."""
