"""Serving: jobs that survive crashes, workers that render them, and the video API in front of both."""
