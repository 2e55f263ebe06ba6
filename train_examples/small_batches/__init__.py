"""New statistics for averaged weights and for other images, by `jaxbn.calibrate.recalibrate`."""
