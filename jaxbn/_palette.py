"""The colours and the resolution of all pictures."""

# The palette of Okabe and Ito, which colour-blind readers can distinguish, without its yellow,
# which is hard to see on white: https://jfly.uni-koeln.de/color/.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Screens of high resolution show pictures at twice the dots of a figure's inches.
DPI = 200
