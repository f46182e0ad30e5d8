"""The test of the image: what it may do, and a count of every event after each thing that befalls a container."""
