from shop.basket import Basket


def test_an_empty_basket_costs_nothing():
    assert Basket().total() == 0


def test_two_pieces_have_the_full_price():
    basket = Basket()
    basket.add("tea", 500, 2)
    assert basket.total() == 1000


def test_three_pieces_are_cheaper():
    basket = Basket()
    basket.add("tea", 500, 3)
    assert basket.total() == 1350


def test_the_receipt_has_a_line_for_each_article():
    basket = Basket()
    basket.add("tea", 500, 3)
    basket.add("cup", 1250)
    assert basket.receipt() == "3 x tea: 13.50\n1 x cup: 12.50\ntotal: 26.00"
